"""The protein recipes on tiny networks, for the test of two processes; see sequence_recipes.py.

protein_recipes.py FILE     several runs in one process (of torchrun); JSON: [config, items]
"""

import json
import sys
from pathlib import Path

from sequence_recipes import in_double, train

from diffdiv import export_proteins
from diffdiv.rewards import protein
from diffdiv.runtime.launch import leave_group

if __name__ == "__main__":
    in_double()
    denoiser, oracle = export_proteins.load_protein_net, protein.load_stability
    export_proteins.load_protein_net = lambda path: denoiser(path).double()
    protein.load_stability = lambda path: oracle(path).double()
    for config, items in json.loads(Path(sys.argv[1]).read_text()):
        train(config, items)
    leave_group(0)
