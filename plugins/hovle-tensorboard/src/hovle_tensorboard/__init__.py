"""A run's metrics as TensorBoard event files in its own folder."""
