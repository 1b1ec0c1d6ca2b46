"""From text to a prepared corpus, the work of `prepare.py`; `corpus.py` opens the result.

sources      which files, and for which machine
text_files   their documents, read as a stream
text_tables  the same for files of rows
sentences    lines split into sentences
vocabulary   learns a tokenizer's vocabulary
encoding     documents into blocks of ids
writing      from sources to shards
shards       the files of a corpus, and their writer
hold_out     a document for evaluation, if the draw chose none
replacing    which folders may be replaced
journal      how far a killed `prepare` had come
merge        one corpus of parts made on many machines
docstrings   the embedded corpus: documentation found on this machine
sample       writes the embedded corpus to files
"""
