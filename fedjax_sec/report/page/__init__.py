"""A folder of runs as one HTML page that holds all it shows: `fedjax-sec report`."""

from fedjax_sec.report.page.assembly import check_packages, write_one, write_two

__all__ = ["check_packages", "write_one", "write_two"]
