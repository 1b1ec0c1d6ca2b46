"""What surrounds the loop of `pretrain.py`: set-up, batches, evaluation, and which example has which number.

setup            everything before the first step
run_folder       RUN: checked before a run, and what is saved in it
from_checkpoint  models from one of its checkpoints
start_pair       a generator and discriminator to continue from
cooccurrence     initial word embeddings from counts
batches          masked examples of a step
mixing           several corpora, visited by weight
evaluation       losses and metrics on held-out text
meter            speed, memory and losses in a row of the log
slots            documents cut into slots, which examples are made of
permutation      their random order, by formula
example_rules    the original's rules, one example at a time
planning         the same rules on a whole batch at once
"""
