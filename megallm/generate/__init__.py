"""Text from a trained model, in any layout."""
