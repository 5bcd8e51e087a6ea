"""What a model or a run will need, computed from its configuration without building anything and without torch."""
