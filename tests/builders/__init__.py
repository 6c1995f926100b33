"""What tests share: data, models, files, commands and values, small enough for seconds."""
