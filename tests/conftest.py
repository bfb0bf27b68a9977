"""One thread per test process: tiny tensors gain nothing from more, and tests may share cores.
Tests of what threads change set their own number."""

import torch

torch.set_num_threads(1)
