import os

if os.environ.get("FUNGI_OFFLINE", "").strip() not in (
    "",
    "0",
):  # read by the hub's client when it is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
