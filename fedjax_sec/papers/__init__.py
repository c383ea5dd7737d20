"""Published numbers (data files) and the tables and figures built from runs, one module a paper."""
