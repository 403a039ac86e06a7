"""Reports of an evaluation: tables, plots, and the page; published figures beside measured ones."""

from heads.report.page import write_report
from heads.report.plots import plot_nll_against_alpha, plot_robustness
from heads.report.tables import markdown_table, table_text

__all__ = ["markdown_table", "plot_nll_against_alpha", "plot_robustness", "table_text", "write_report"]
