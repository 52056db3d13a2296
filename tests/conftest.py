import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
# A shell's background jobs begin with Ctrl-C ignored, and so would the programs tested here.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # and under nohup with this one ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
