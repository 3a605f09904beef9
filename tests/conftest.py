"""What all tests need: the scripts and the tools can be imported, and torch stays on one core."""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]
torch.set_num_threads(1)
