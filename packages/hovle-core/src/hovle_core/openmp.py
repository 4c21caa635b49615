"""How idle OpenMP threads wait; libgomp reads it once, when torch is imported, so torch is not imported here."""

# For `GOMP_SPINCOUNT`, of a process alone on its cores: iterations that an idle thread waits awake, about 5 ms. That is
# longer than the gaps between a step's operations, whose wake-ups cost more than many an operation itself, and short
# beside what another process would have to wait.
SPINS = "100000"
