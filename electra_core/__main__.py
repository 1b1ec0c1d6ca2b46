"""`python -m electra_core …` is `electra …` (for torchrun)."""

import sys

from electra_core.cli import main

sys.exit(main())
