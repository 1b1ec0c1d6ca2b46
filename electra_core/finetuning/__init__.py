"""What surrounds `finetune.py`: data, model, steps, and the folder of a fine-tuning.

settings       every setting, with a line of documentation
data           reads, splits, tokenises and batches examples
data_warnings  what is odd about them
dev_split      examples held out if there is no dev file
token_cache    tokenised data, kept on disk
model          the model that fine-tuning starts from
kept_head      what it keeps of a fine-tuned model's head
seed           training of one seed
steps          its batches, rate and engine
static_task    batches in a few fixed shapes
folder         OUT: the best model, and what a resumed run needs
card           README.md of a fine-tuned model
"""
