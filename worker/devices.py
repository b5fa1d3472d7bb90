"""The devices of this machine that `timetuner up --devices all` has a worker for each of, as a list in JSON.

python -m worker.devices
"""

import json

import torch


def all_devices() -> list[str]:
    """Every GPU by its name for `DEVICE`, or the processor where there is none."""
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        if count := module.device_count():
            return [f"{kind}:{k}" for k in range(count)]
    return ["mps"] if torch.backends.mps.is_available() else ["cpu"]


if __name__ == "__main__":
    print(json.dumps(all_devices()))
