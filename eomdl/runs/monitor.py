"""What watches a run from outside."""

import abc

from eomdl._types import Args, Params, State


class AbstractMonitor(abc.ABC):
    """What measures a run between two of its chunks and changes nothing: telemetry, a logger, a progress display.

    ```python
    class Printer(eomdl.runs.AbstractMonitor):
        def is_due(self, step):
            return step % 100 == 0

        def measure(self, step, params, state, args):
            print(step, loss(params, args))


    run = eomdl.descend(loss, params, optimizer, 1000, args=data, monitors=[Printer()])
    ```

    A monitor needs no run: a training loop of your own may call `is_due` and `measure` itself. What it raises ends the
    run, which then hands over what it has computed.

    **Cost** of a run with monitors: `measure` where it is due. The run's compiled program ends at these steps, so many of
    them cost as many calls from the host.
    """

    @abc.abstractmethod
    def is_due(self, step: int) -> bool:
        """Whether to measure before this step. Runs ask it of every step before they begin, and once more where it is due."""

    @abc.abstractmethod
    def measure(self, step: int, params: Params, state: State, args: Args) -> None:
        """Measure before a step.

        - `params`: the parameters there.
        - `state`: the optimizer's state in `eomdl.descend`, the state of the map in `eomdl.iterate`, of the flow in
            `eomdl.solve`; of an `eomdl.Ensemble` those of all members.
        - `args`: the data of the step: its batch, or `args` where there are no batches.
        """
