"""Hands a worker process of Ray over to the starter (`starter.py`), where one is running."""

import os
import sys

if "CKD_TEST_FAST_START" in os.environ and any(
    a.endswith(("/default_worker.py", "/setup_worker.py")) for a in sys.orig_argv[1:2]
):
    from starter import hand_over  # it is in the folder of this file

    if hand_over(os.environ["CKD_TEST_FAST_START"]):
        os._exit(0)
