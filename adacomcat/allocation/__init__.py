"""A budget → a plan: a multiple-choice knapsack over truncation errors, refined on images."""
