import subprocess
import sys

SCRIPT = """
import sys
import torch
from cvtrain.core.compiler import spare
from cvtrain.core.complexity import count_macs

model = torch.nn.Linear(3, 2)
spare(torch.optim.Optimizer)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
assert count_macs(model, torch.ones(1, 3)) == 6
assert "torch._dynamo" not in sys.modules
"""


def test_an_optimizer_and_the_counter_of_macs_import_no_compiler():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
