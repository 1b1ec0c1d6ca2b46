"""A run while it lasts and afterwards: its folder, log and state.

folder            RUN: created, locked, searched for a checkpoint
state             whether it is running, and how it ended
checkpoint_files  which checkpoints there are
metrics_log       RUN/metrics.jsonl
progress          a bar, or lines where there is no terminal
notices           lines for the user, and where they go
stop_request      signals and time limits
guards            spikes of the loss, and a post-mortem
status            what `electra status` shows
"""
