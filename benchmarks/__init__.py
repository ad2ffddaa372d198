"""How long the main parts take and how much memory they need, beside other libraries in one run."""
