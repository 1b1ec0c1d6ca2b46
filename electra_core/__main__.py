"""`python -m electra_core …` is `electra …` (for torchrun)."""

import os
import sys

from electra_core import torchrun

if torchrun.is_used():  # DDP's warning about a choice that distributed.py explains; read by torch's import
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from electra_core.cli import main

sys.exit(main())
