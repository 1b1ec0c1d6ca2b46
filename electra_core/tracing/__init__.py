"""`electra trace`: what `trace.py` records with, and how a trace is shown.

probes    gradients and shapes of the running step
words     sentences that both views share
terminal  the trace as text
page      the trace as a page to step through
"""
