"""Reading and writing files of any kind; nothing here knows of models or tasks.

byte_files  bytes, compressed or not
text_lines  lines of text files and of standard input
delimited   CSV into cells
row_files   rows as named cells: CSV, TSV, JSON lines, Parquet
toml_files  TOML
protobuf    protocol-buffer messages
clutter     what file managers leave in folders
new_folder  a folder that appears complete or not at all
new_file    a small file, likewise, or surely on the disk
json_files  JSON
unix        the modules that only Unix has
"""
