"""A training step of one's own: jaxcats' step with an average of the weights beside it, an epoch in one program.

python scripts/examples/step.py --config configs/dogscats_lite0.yaml --data.root data/dogscats
"""

import jax

from jaxcats import sentence
from jaxcats.common.cli import parse, run_command
from jaxcats.common.stats import summary
from jaxcats.core import scan
from jaxcats.train import drivers, experiment
from jaxcats.train import features as features_module


def main(argv):
    setup = experiment.setup(parse(argv, prog="step.py", description="An average of the weights.")[0])
    params, stats, _ = experiment.initial_params(setup)
    features, _ = features_module.precompute(setup, params, stats)
    valid, n, plan = setup.index.splits["valid"], len(setup.index.splits["train"]), experiment.plans(setup)[0]
    step, create = experiment.make_phase(
        setup, plan
    )  # jaxcats.make_train_step with a configuration's loss and optimizer

    def averaged(carry, batch):  # whatever maps (carry, batch) to (carry, numbers) can be driven
        state, mean = carry
        state, sums = step(state, batch)
        return (state, jax.tree.map(lambda m, p: 0.95 * m + 0.05 * p, mean, state.params)), sums

    run, arrays, carry = jax.jit(scan.make_scan(averaged)), drivers.resident(setup, plan, features["train"]), None
    for epoch in range(plan.phase.epochs):
        order = scan.epoch_order(n, batch_size=plan.phase.batch_size, seed=setup.config.seed, epoch=epoch)
        carry, _ = run(carry or (create(params, stats), params), arrays, order)
        for name, weights in (("last", carry[0].params), ("average", carry[1])):
            logits, _ = setup.model.apply_head(weights, carry[0].batch_stats, features["valid"], train=False)
            found = summary(jax.device_get(logits), valid.labels)
            print(f"epoch {epoch}, {name}: {sentence(found['errors'], found['n'])}, log loss {found['log_loss']:.4f}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
