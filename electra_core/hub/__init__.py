"""The Hub's layout of a model directory, for `model_dir.py` and `tokenizer.py`.

layout             names of tensors, fields of config.json
folder_files       reads a model directory's small files; no link leads out of it
weight_files       safetensors and older formats
meta_models        models without memory, to load into
model_places       what `--model NAME` means
tokenizer_config   the settings beside a vocabulary
tokenizer_loading  finds a tokenizer's file and opens it
tokenizer_parts    special tokens, normalisation, pieces
"""
