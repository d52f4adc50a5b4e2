"""What the longer commands do, one module each; `guard.cli` holds their options."""
