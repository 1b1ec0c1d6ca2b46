"""What people look at: reports, tables, plots.

task_report        what a fine-tuned model gets right and wrong
report_tables      its tables
class_report       its tables for classes
multilabel_report  its tables where a text may have several labels
demo_report        what the demo found, as charts and warnings
demo_page          the demo's page
passages           texts with replaced tokens, scored
status_views       `electra status` as text, page and picture
plots              plots as inline SVG
pages              self-contained HTML pages
widths             how many columns a text takes in a terminal
"""
