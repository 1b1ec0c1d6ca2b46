"""How and where a step is executed: engines, fixed shapes, devices, memory, several processes.

placement      `--device` and `--precision`
engine         eager, static, compile, graph
step_runners   steps kernel by kernel, or replayed
capture        of a CUDA graph, and what follows one that failed
input_buffers  a step's inputs at fixed addresses
static_batch   pre-training's batches in a few fixed shapes
filling        rounds a batch's number of tokens up
fake_step      a step traced without values: launches, kept bytes, memory
memory         predicted, measured, made to fit
host_memory    what a process may take of main memory
machine        what this machine has
torch_state    torch's settings that a caller may have changed
cross_check    kernels against their twins, before a run relies on them
torchrun       the variables that it sets, and srun
distributed    one run on several processes
sharding       models of which every rank stores a part
"""
