"""Which path does the teacher take behind its student?
====================================================

A model of two weights, so that the path can be drawn. The student descends on noisy gradients of a narrow valley; the
teacher is the moving average of where it has been. The decay decides how much of the start it keeps.
"""

import matplotlib.pyplot as plt
import torch

import calrobust as cr

steps = 60
curvature = torch.tensor([0.6, 6.0])  # the loss is half its product with the squared weights
start = torch.tensor([-3.0, 1.0])
decays = {
    "decay 0.5": 0.5,
    "decay 0.95": 0.95,
    "decay 0.999": 0.999,
    "linear_warmup(0.05, 0.9)": cr.schedules.linear_warmup(0.05, 0.9, updates=12),
}

# %%
# :class:`~calrobust.EMATeacher` copies any module; one call of ``update`` a step moves the copy.


def run(decay):
    """The weights of student and teacher after each step, [steps + 1, 2] each."""
    torch.manual_seed(0)
    student = torch.nn.Linear(2, 1, bias=False)
    student.weight.data = start[None].clone()
    teacher = cr.EMATeacher(student, decay=decay)
    paths = [(start, start)]
    for _ in range(steps):
        noisy = curvature * student.weight.data + 3.0 * torch.randn(2)
        student.weight.data -= 0.15 * noisy
        teacher.update(student)
        paths.append((student.weight.data[0].clone(), teacher.module.weight[0].clone()))
    return (torch.stack(path) for path in zip(*paths, strict=True))


def loss(weights):
    return (curvature * weights.square()).sum(-1) / 2


sides = torch.linspace(-3.4, 1.4, 120), torch.linspace(-1.6, 1.6, 120)
x, y = torch.meshgrid(*sides, indexing="xy")
heights = loss(torch.stack((x, y), -1))
figure, axes = plt.subplots(2, 2, figsize=(7.2, 4.6), sharex=True, sharey=True)
print(f"{'':26} {'weight on the start':>20} {'loss at the end':>16} {'mean loss, last 20':>19}")
for ax, (name, decay) in zip(axes.flat, decays.items(), strict=True):
    student, teacher = run(decay)
    ax.contour(x, y, heights, levels=[0.1, 0.5, 1, 2, 4, 8], colors="0.8", linewidths=0.7)
    ax.plot(*student.T, color="C5", linewidth=0.8, label="student")
    ax.plot(*teacher.T, ".-", color="C1", markersize=3, linewidth=1.2, label="teacher")
    ax.plot(*start, "ks", markersize=4)
    ax.plot(0, 0, "k*")
    ax.set_title(name)
    left = 1.0
    for n in range(steps):
        left *= decay(n) if callable(decay) else decay
    print(f"{name:26} {left:20.1%} {loss(teacher[-1]):16.2f} {loss(teacher[-20:]).mean():19.2f}")
print(f"{'student':26} {0:20.1%} {loss(student[-1]):16.2f} {loss(student[-20:]).mean():19.2f}")
axes[0, 0].legend(loc="lower right")
figure.supxlabel("first weight")
figure.supylabel("second weight")
plt.show()

# %%
# The square is the pre-trained model, the star the minimum. A small decay follows the noise, a large one stays at
# home, and between them the average runs down the middle of the valley. The paper's warm-up leaves the start at the
# first updates: 95 % of the teacher is the student after one. :doc:`/guides/choosing` is about which one to take.
