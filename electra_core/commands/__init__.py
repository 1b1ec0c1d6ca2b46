"""The commands of `electra`: their flags, and the calls behind them. `cli.py` finds the command.

flags    what several commands share
train    demo, prepare, pretrain, finetune
use      evaluate, predict, export, convert
inspect  detect, trace, info, flops, status
"""
