"""A training that is watched while memory runs out, or metrics fail, at chosen passes."""

import math

import numpy as np
import torch
from torch import nn

from gradmon import Monitor, every
from gradmon.sinks import MemorySink
from tests import references
from tests.zoo.problem import averaged_problem

SIZE, STEPS, MEMORY = 6, 5, 1 << 20


def mse(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def data(count=STEPS):
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(count):
        x, target = (torch.randn(SIZE, width, generator=generator).double() for width in (3, 2))
        made.append((x, target))
    return made


class Loss:
    """The loss of the monitor, which knows what a pass is for, and fails where it is told to.

    Args:
        fails: ``fails(purpose, number of the step, of the call in that step)``.
        error: Makes what is raised.
    """

    def __init__(self, fails=lambda purpose, step, call: False, error=None):
        self.fails, self.error = fails, error
        self.before, self.after, self.step, self.call = [], [], 0, 0
        self.seen = []

    def purpose(self, model):
        modes = {type(mode).__name__ for mode in torch.overrides._get_current_function_mode_stack()}
        weights = [p.detach() for p in model.parameters()]
        if "Capture" in modes:
            return "examples"
        for name in ("before", "after"):
            for place, values in enumerate(reversed(getattr(self, name))):
                if all(torch.equal(a, b) for a, b in zip(weights, values, strict=True)):
                    return name if place == 0 else f"{name} the last"
        return "moved"

    def __call__(self, model, batch):
        purpose = self.purpose(model)
        self.call += 1
        self.seen.append((purpose, self.step, self.call))
        if self.fails(purpose, self.step, self.call):
            raise self.error()
        return mse(model, batch)


class Run:
    """A training that is watched at every step."""

    def __init__(self, loss=None, steps=STEPS, schedule=None, **options):
        self.model, self.loss, self.sink, self.references = mlp(), loss, MemorySink(), {}
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        schedule = every(1) if schedule is None else schedule
        options = {"mask": None, "max_memory": MEMORY, "micro_batches": 3, **options}
        self.monitor = Monitor(self.model, optimizer, loss, schedule=schedule, sinks=[self.sink], **options)
        self.weights, self.batches = [references.flat_weights(self.model)], data(steps)
        for number, batch in enumerate(self.batches, 1):
            if isinstance(loss, Loss):
                loss.before.append([p.detach().clone() for p in self.model.parameters()])
            optimizer.zero_grad()
            mse(self.model, batch).backward()
            optimizer.step()
            if isinstance(loss, Loss):
                loss.after.append([p.detach().clone() for p in self.model.parameters()])
                loss.step, loss.call = number, 0
            self.monitor.step(batch)
            self.weights.append(references.flat_weights(self.model))
        self.random = torch.get_rng_state()

    def readings(self, name):
        return {r.step: r for r in self.sink.readings if r.name == name}

    @property
    def memory(self):
        return self.monitor._setting.memory.experience.max_memory

    def expected(self, number):
        """By their definitions, from gradients that were taken one by one."""
        w, moved, chi = self.weights[number - 1], self.weights[number], self.batches[number - 1]
        model = mlp()
        start = 0
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.from_numpy(w[start : start + p.numel()]).reshape(p.shape))
                start += p.numel()
        h, H = (
            references.batch_gradient(model, mse, chi),
            references.shares(averaged_problem(model, mse, chi)),
        )
        h_step = references.gradient_at(model, mse, chi, moved)
        found = {
            "loss": float(mse(model, chi).detach()),
            "grad_norm": np.linalg.norm(h),
            "param_norm": np.linalg.norm(w),
            "update_ratio": references.update_ratio(moved - w, w),
            "step_ratio": references.step_ratio(h, h_step),
            "gradient_rank": references.gradient_rank(H),
            "gradient_confusion": references.gradient_confusion(H, 3),
            "gradient_diversity": references.gradient_diversity(H, 3),
            "gradient_coherence": references.gradient_coherence(H),
            "noise_scale": references.noise_scale(H),
            "noise_ratio": references.noise_ratio(H),
            "gradient_snr": references.gradient_snr(H),
        }
        if number < len(self.batches):
            other = self.batches[number]
            h_next, h_both = (references.gradient_at(model, mse, other, at) for at in (w, moved))
            found["step_share"] = references.step_share(h, h_step, h_next)
            found["batch_share"] = references.batch_share(h, h_step, h_next)
            found["step_condition"] = references.step_condition(h, h_both, w, moved - w)
        if number == 1:

            def gradient(at):
                return references.gradient_at(model, mse, chi, at)

            taken = references.krylov_directions(gradient, w, 3, 1e-3 * np.linalg.norm(w))
            scaled = [gap - h for gap in taken.gradients]
            found["weight_condition"] = references.span_condition(taken.omegas, scaled, w, h)
            found["weight_cosine"] = references.weight_cosine(h, taken.gradients)
        return found

    def assert_right(self, names, numbers):
        for number in numbers:
            expected = self.expected(number)
            for name in set(names).intersection(expected):
                found = self.readings(name)[number]
                assert found.reason is None or math.isinf(found.value), found
                np.testing.assert_allclose(found.value, expected[name], rtol=1e-6, err_msg=f"{name} {number}")
