"""The stages of training. Each is an object of one interface (`base.Stage`), found by name through a hook."""
