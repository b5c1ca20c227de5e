"""From a plan to an allocation whose forward runs."""
