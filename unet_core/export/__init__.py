"""What a run holds, in the forms that other programs read. Nothing below imports it back."""
