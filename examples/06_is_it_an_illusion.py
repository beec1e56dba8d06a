"""A direction that flips every answer, in a model that does not use it: planted on purpose, and found out.

python examples/06_is_it_an_illusion.py

Sixteen neurons are added to one MLP of the bundled model. They write nothing on any real prompt, so its answers stay as
they were; yet exchanging one direction of them between two prompts turns the answer around. The audit says which of the
two is the model's own: that direction, or the one that the residual stream carries the variable along.
"""

import subspace_probe as sp
from subspace_probe.organisms.gadgets import plant_gadget


def main() -> None:
    model = sp.load_model("organism:chat")
    train = sp.load_contrast("organism:chat/knob", split="train", n=192)
    test = sp.load_contrast("organism:chat/knob", split="test", n=64)
    model, gadget = plant_gadget(model, train, 2, sp.LAST)
    print(f"the gadget changes what the model says by {gadget.kl:.0e} nats")

    acts = model.capture(train, sites=sp.Site(2), where=sp.LAST)
    stream = sp.MeanDifference(null_draws=0).fit(acts, sp.Site(2))
    clean, corrupt = test.sides()
    for name, direction in {"planted": gadget.direction, "stream": stream}.items():
        site = direction.site or sp.Site(2)
        patch = sp.Patch(sp.Source.of(model.capture(clean, sites=site, where=sp.LAST)), sp.LAST, direction)
        report = sp.audit(model, patch, corrupt, "logit_difference", natural=test, budget="quick")
        print(f"{name}: {report.finding('mechanism.exchange').note}")
        print(f"{name}: control {report.finding('control').verdict}, mechanism {report.finding('mechanism').verdict}")
        print(f"    {report.finding('mechanism').note}")
        print(f"report: {sp.figures.save_html(report, f'{name}.html')}")


if __name__ == "__main__":
    main()
