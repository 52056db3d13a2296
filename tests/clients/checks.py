"""What the clients' scripts share: each check runs by itself, and a line of JSON says how it ended.
"""

import asyncio
import inspect
import json
import os
import re

BASE, MODEL = os.environ["BASE_URL"], os.environ["MODEL"]
QUESTION = "Say hello to the cat."


def check(name, call):
    """Print how a call ended: works (it returned something true), refused (the server's 4xx), or
    broken (anything else)."""
    try:
        found = call()
        found = asyncio.run(found) if inspect.iscoroutine(found) else found
        how, why = ("works", "") if found else ("broken", f"returned {found!r}")
    except Exception as error:
        how, why = ("refused" if refused(error) else "broken"), f"{type(error).__name__}: {error}"
    print(json.dumps({"check": name, "how": how, "why": " ".join(why.split())[:300]}), flush=True)


def refused(error):
    """Whether a status from 400 to 499 is behind an exception."""
    while error:
        status = getattr(error, "status_code", None) or getattr(
            getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return 400 <= status < 500
        if found := re.search(r"[Ee]rror code: (\d{3})", str(error)):
            return found[1].startswith("4")
        error = error.__cause__ or error.__context__
    return False
