"""The kinds of downstream task: how each reads, encodes, scores and predicts.

interface      all that differs between them
classify       one label for a text or a pair; regression
multilabel     any number of labels
choices        the right one of several endings
tagging        a tag for every word
squad          an answer in a context
squad_metrics  exact match and F1, by SQuAD's rules
named_tasks    GLUE, IMDb, CoNLL-2003, SQuAD
task_files     task.json beside a fine-tuned model
guessed        data for a model without task.json
run_model      a model over many sequences
answer_files   the file that predict writes
in_memory      data in memory where a file is expected
"""
