"""Everything that processes of ours import, for `tests.forked` to import once and fork from.

No thread may run here: a fork has only the thread that forked, and locks that others held stay locked in it.
"""

import gc
import importlib
import os
import pkgutil
from itertools import chain

import torch

ROOTS = ("service", "worker", "timetuner_core")
# These are run, not imported, or read the environment, which is another one in each fork.
NOT_HERE = ("service.__main__", "worker.__main__", "worker.app", "worker.dispatcher")
LATE = (  # Our code, or that of others, imports these only when it needs them.
    "alembic.command",
    "celery.apps.worker",
    "celery.bin.worker",
    "celery.concurrency.thread",
    "diffusers",
    "kombu.transport.redis",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite.pysqlite",
    "uvicorn",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.httptools_impl",
)


def _modules() -> list[str]:
    walked = (
        pkgutil.walk_packages(importlib.import_module(root).__path__, f"{root}.")  # the roots' own `__init__` first
        for root in ROOTS
    )
    return [module.name for module in chain(*walked) if module.name not in NOT_HERE]


torch.set_num_threads(1)
for _name in (*_modules(), *LATE):
    importlib.import_module(_name)
_threads = os.listdir("/proc/self/task")
if len(_threads) > 1:
    raise RuntimeError(f"importing our modules started {len(_threads) - 1} threads; accepted: none")
gc.freeze()  # Collections in the forks then copy no page of what is shared.
