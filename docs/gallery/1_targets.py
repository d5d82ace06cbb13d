"""What does each target ask of the similarity map?
================================================

A batch of eight pairs, in which the second and the third resemble each other, and so do the sixth and the seventh.
The student, in training, sees that a little; the teacher sees it clearly. The losses take features, but their
gradient on the map itself is not far: let the rows of the map be the image features, and unit vectors the text
features, then the products of the two are the map.
"""

import matplotlib.pyplot as plt
import torch

import calrobust as cr

torch.manual_seed(0)
n, texts = 8, torch.eye(8)
own, alike = torch.eye(n).bool(), torch.zeros(n, n, dtype=torch.bool)
for i, j in ((1, 2), (5, 6)):
    alike[i, j] = alike[j, i] = True
student = 3.0 * own + 2.0 * alike + 0.4 * torch.randn(n, n)
teacher = 4.0 * own + 3.2 * alike + 0.2 * torch.randn(n, n)

# %%
# Each loss compares the student's softmax, over rows and over columns, with a target. Its gradient on the map is the
# difference of the two: blue cells are pulled up, red ones are pushed down. Both losses are shown as the mean of the
# two directions; MKD is their sum, hence the half.

smoothing = 0.3
losses = {
    "hard": cr.MultimodalContrastiveLoss(),
    "smoothed": cr.MultimodalContrastiveLoss(label_smoothing=smoothing),
    "distilled": 0.5 * cr.MultimodalDistillationLoss(),
}
targets = {
    "hard": own.float(),
    "smoothed": (1 - smoothing) * own + smoothing / n,
    "distilled": teacher.softmax(1),
}
gradients = {}
print("mean gradients, times N")
print(f"{'target':10} {'own pair':>9} {'look-alike':>11} {'others':>7} {'(loss)':>9}")
for name, loss in losses.items():
    similarities = student.clone().requires_grad_()
    features = (similarities, texts, 1.0)
    value = loss(*features, teacher, texts, 1.0) if name == "distilled" else loss(*features)
    value.backward()
    gradients[name] = n * similarities.grad
    means = [gradients[name][cells].mean() for cells in (own, alike, ~(own | alike))]
    print(f"{name:10} {means[0]:+9.3f} {means[1]:+11.3f} {means[2]:+7.3f} {value:9.3f}")

# %%
# The hard target pushes the look-alikes apart as if they were wrong. Smoothing pushes all others less, alike or not.
# The teacher's map asks for the look-alikes, so the student is pulled towards them, and it stops where the teacher
# stops.

figure, axes = plt.subplots(2, 4, figsize=(7.2, 3.8))
maps = {"student": student.softmax(1), **targets}
for ax, (name, values) in zip(axes[0], maps.items(), strict=True):
    shown = ax.imshow(values, cmap="Greys", vmin=0, vmax=1)
    ax.set_title(name if name == "student" else f"target: {name}")
figure.colorbar(shown, ax=axes[0], label="softmax of a row", shrink=0.8)
axes[1, 0].axis("off")
for ax, (name, gradient) in zip(axes[1, 1:], gradients.items(), strict=True):
    pull = ax.imshow(gradient, cmap="RdBu_r", vmin=-0.5, vmax=0.5)
    ax.set_title(f"gradient: {name}")
figure.colorbar(pull, ax=axes[1], label="gradient × N", shrink=0.8)
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
axes[0, 0].set(xlabel="texts", ylabel="images")
plt.show()
