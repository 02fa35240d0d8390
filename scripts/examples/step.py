"""Your own train step: jaxcats' step plus a moving average of the weights; for a first phase with precompute.

python scripts/examples/step.py --config configs/dogscats_lite0.yaml --data.root data/dogscats
"""

import jax

from jaxcats import sentence
from jaxcats.common.cli import parse, run_command
from jaxcats.common.stats import summary
from jaxcats.core import scan
from jaxcats.train import drivers, experiment, features


def main(argv):
    exp = experiment.setup(parse(argv, prog="step.py", description="An average of the weights.")[0])
    params, stats, _ = experiment.initial_params(exp)
    inputs, _ = features.precompute(exp, params, stats)
    valid, n, plan = exp.index.splits["valid"], len(exp.index.splits["train"]), experiment.plans(exp)[0]
    step, create = experiment.make_phase(exp, plan)  # make_train_step with the loss and optimizer of the configuration

    def averaged_step(carry, batch):  # a driver accepts any function (carry, batch) -> (carry, metrics)
        state, average = carry
        state, metrics = step(state, batch)
        return (state, jax.tree.map(lambda a, p: 0.95 * a + 0.05 * p, average, state.params)), metrics

    run, arrays = jax.jit(scan.make_scan(averaged_step)), drivers.resident_arrays(exp, plan, inputs["train"])
    carry = create(params, stats), params
    for epoch in range(plan.phase.epochs):
        order = scan.epoch_order(n, batch_size=plan.phase.batch_size, seed=exp.config.seed, epoch=epoch)
        carry, _ = run(carry, arrays, order)
        for name, weights in (("last", carry[0].params), ("average", carry[1])):
            logits, _ = exp.model.apply_head(weights, carry[0].batch_stats, inputs["valid"], train=False)
            m = summary(jax.device_get(logits), valid.labels)
            print(f"epoch {epoch}, {name}: {sentence(m['errors'], m['n'])}, log loss {m['log_loss']:.4f}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
