"""Records in; tables, verdicts, curves, plots and the page out. Never measures."""
