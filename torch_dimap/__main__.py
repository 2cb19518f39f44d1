import sys

from torch_dimap.command import main

sys.exit(main())
