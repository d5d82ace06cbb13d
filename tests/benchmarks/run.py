"""Time and memory of calrobust beside its peers.

python tests/benchmarks/run.py [--only losses|cuda|compile|ema|metrics|temperature|import|coverage] [--write]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from benchmarks import page

    page.main()
