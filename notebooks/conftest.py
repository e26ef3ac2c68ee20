"""nbval: a cell marked NBVAL_CHECK_OUTPUT is compared by what it prints and shows, not by its
warnings; a kernel that does not come up is started once more.
"""

from functools import partial

from nbval import kernel

from companion.run import started


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):  # notebooks only; warnings carry process ids and paths
        collector.skip_compare += ("stderr",)


def pytest_configure():
    """Start a silent kernel again: tests of two notebooks run side by side."""
    kernel.start_new_kernel = partial(started, kernel.start_new_kernel)
