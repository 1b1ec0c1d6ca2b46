"""`python -m electra_core …` is `electra …` (for torchrun)."""

import os
import sys

from electra_core.execution import torchrun

if torchrun.may_be_used():  # silences a warning of DDP (execution/distributed.py says why); read at torch's import
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from electra_core.cli import main

sys.exit(main())
