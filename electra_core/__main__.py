"""`python -m electra_core …` is `electra …` (for torchrun)."""

import os
import sys

if "LOCAL_RANK" in os.environ:  # DDP's warning about a choice that distributed.py explains; read by torch's import
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from electra_core.cli import main

sys.exit(main())
