"""nbval: a cell marked NBVAL_CHECK_OUTPUT is compared by what it prints and shows, not by its
warnings.
"""


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):  # notebooks only; warnings carry process ids and paths
        collector.skip_compare += ("stderr",)
