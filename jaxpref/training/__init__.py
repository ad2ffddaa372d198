"""Training: optimizers, the jitted step, checkpoints, and the loop that can be killed.

Each part works without the others: `step.make_step` needs no run folder, `loop.fit` no model.
"""
