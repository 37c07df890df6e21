import subprocess
import sys

SCRIPT = """
import sys
import torch
from cvtrain.core.compiler import spare
from cvtrain.core.complexity import count_macs

model = torch.nn.Linear(3, 2)
spare(torch.optim.Optimizer)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
assert count_macs(model, torch.ones(1, 3)) == 6
assert "torch._dynamo" not in sys.modules
"""


def test_training_and_counting_import_no_compiler():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
