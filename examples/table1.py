"""Print Table 1 of the paper, our counts beside its numbers.

    python examples/table1.py                  random weights, no download
    python examples/table1.py --pretrained     timm's ImageNet-1K weights

Parameters and uniform FLOPs do not depend on the weights, masked FLOPs do. The command
``python -m torch_dimap table1`` prints the same; the counting itself is three calls:

    global_module_aware_unstructured(group_parameters(model), amount=0.35)
    print(summarize(model, torch.zeros(1, 3, 224, 224)))
    remove_all(model)
"""

import sys

from torch_dimap.command import main

if __name__ == "__main__":
    sys.exit(main(["table1", *sys.argv[1:]]))
