"""Readers of labelled data: files in the usual formats become examples.

columns       which column holds what
label_cells   one label in a cell, or several
labelled      texts and pairs with labels
tagged_files  sentences with a tag for every word
tagged_rows   the same from spreadsheets and annotation tools
groups        which examples belong together
squad_files   questions on a context, with answers
features      examples as token ids: truncation, windows, which of them form a batch
"""
